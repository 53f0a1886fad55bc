// Lets the search box work where the site is opened from the disk: browsers start no Worker from a
// file, so its script runs in a hidden frame, which answers to the same calls. Served sites keep theirs.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    #waiting = [];
    #scope = null;

    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.addEventListener("load", () => this.#start(frame.contentWindow, url), { once: true });
      document.body.append(frame);
    }

    #start(scope, url) {
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = scope.document.createElement("script");
      script.addEventListener("load", () => {
        this.#scope = scope;
        this.#waiting.splice(0).forEach((data) => this.postMessage(data));
      });
      script.src = url;
      scope.document.body.append(script);
    }

    postMessage(data) {
      if (this.#scope === null) this.#waiting.push(data);
      else this.#scope.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
