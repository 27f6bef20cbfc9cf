"""Training: configuration, data, losses and files of a run. The loop is `train_util.TrainLoop`."""
