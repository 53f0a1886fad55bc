/* A CUDA driver without a GPU: it records its calls, and fails on request.

   Built as libcuda.so.1, so that ctypes loads it. Tests read `stub_calls` in the same
   process. The first digit of a handle tells contexts, modules and functions apart. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_CALLS 4096
#define MAX_VALUES 40
#define MAX_CONTEXTS 16
#define DEVICES 2

typedef struct {
    char function[40];
    char text[200];
    int64_t count;
    uint64_t values[MAX_VALUES];
} Call;

EXPORT Call stub_calls[MAX_CALLS];
EXPORT int64_t stub_count;      /* calls so far; those beyond MAX_CALLS are only counted */
EXPORT int64_t stub_parameters; /* how many the next launch passes, 8 bytes each */
EXPORT unsigned char stub_image[1 << 20];
EXPORT int64_t stub_image_size; /* bytes of the next module to copy to stub_image */
EXPORT char stub_failing[40];   /* the function whose next call returns stub_error */
EXPORT int64_t stub_error;

static __thread uint64_t contexts[MAX_CONTEXTS];
static __thread int depth;
static int64_t modules, functions;

static int record(const char *function, const char *text, int count, const uint64_t *values) {
    int64_t at = stub_count++;
    if (at < MAX_CALLS) {
        Call *call = &stub_calls[at];
        memset(call, 0, sizeof *call);
        strncpy(call->function, function, sizeof call->function - 1);
        strncpy(call->text, text, sizeof call->text - 1);
        call->count = count;
        memcpy(call->values, values, count * sizeof *values);
    }
    if (strcmp(function, stub_failing))
        return 0;
    stub_failing[0] = 0;
    return (int)stub_error;
}

#define RECORD(text, ...)                                                                         \
    do {                                                                                          \
        uint64_t values[] = {__VA_ARGS__};                                                        \
        int error = record(__func__, text, (int)(sizeof values / sizeof *values), values);        \
        if (error)                                                                                \
            return error;                                                                         \
    } while (0)

EXPORT int cuInit(unsigned flags) {
    RECORD("", flags);
    return 0;
}

static const struct {
    int error;
    const char *name;
} names[] = {
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {4, "CUDA_ERROR_DEINITIALIZED"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {218, "CUDA_ERROR_INVALID_PTX"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {999, "CUDA_ERROR_UNKNOWN"},
};

EXPORT int cuGetErrorName(int error, const char **name) {
    *name = 0;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].error == error)
            *name = names[i].name;
    return *name ? 0 : 1;
}

EXPORT int cuDeviceGet(int *device, int ordinal) {
    RECORD("", (uint64_t)ordinal);
    if (ordinal < 0 || ordinal >= DEVICES)
        return 101; /* CUDA_ERROR_INVALID_DEVICE */
    *device = ordinal;
    return 0;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    RECORD("", (uint64_t)attribute, (uint64_t)device);
    if (attribute != 75 && attribute != 76)
        return 1; /* CUDA_ERROR_INVALID_VALUE */
    *value = attribute == 75 ? (device ? 12 : 9) : 0; /* sm_90 and sm_120 */
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(uint64_t *context, int device) {
    RECORD("", (uint64_t)device);
    *context = 0xC0000 + device;
    return 0;
}

/* Whether the calling thread holds the interpreter's lock. */
static uint64_t holds_gil(void) {
    int (*check)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
    return check ? (uint64_t)check() : 2;
}

EXPORT int cuCtxGetCurrent(uint64_t *context) {
    RECORD("", holds_gil());
    *context = depth ? contexts[depth - 1] : 0;
    return 0;
}

EXPORT int cuCtxPushCurrent_v2(uint64_t context) {
    RECORD("", context);
    if (depth == MAX_CONTEXTS)
        return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
    contexts[depth++] = context;
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(uint64_t *context) {
    RECORD("", 0);
    if (!depth)
        return 201; /* CUDA_ERROR_INVALID_CONTEXT */
    depth--;
    if (context)
        *context = contexts[depth];
    return 0;
}

EXPORT int cuModuleLoadData(uint64_t *module, const void *image) {
    RECORD("", depth ? contexts[depth - 1] : 0);
    memcpy(stub_image, image, stub_image_size);
    *module = 0xD0000 + ++modules;
    return 0;
}

EXPORT int cuModuleGetFunction(uint64_t *function, uint64_t module, const char *name) {
    RECORD(name, module);
    *function = 0xF0000 + ++functions;
    return 0;
}

EXPORT int cuLaunchKernel(uint64_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, uint64_t stream,
                          uint64_t **parameters, void **extra) {
    uint64_t values[MAX_VALUES] = {
        function, gx, gy, gz, bx, by, bz, shared, stream, (uint64_t)extra,
        depth ? contexts[depth - 1] : 0,
    };
    for (int64_t i = 0; i < stub_parameters; i++)
        values[11 + i] = *parameters[i];
    return record(__func__, "", (int)(11 + stub_parameters), values);
}
