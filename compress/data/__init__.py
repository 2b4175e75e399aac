"""Data: from folders, arrays, torchvision or your own callable to three splits of normalised batches."""
