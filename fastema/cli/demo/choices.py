"""What may be asked of the demo, known before anything heavy is imported."""

MODEL_NAMES = ("cnn", "resnet", "mlp")
TRAIN_IMAGES = 898  # half of them: a large test set, so that 0.1 points of accuracy can be seen
