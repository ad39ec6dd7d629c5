"""What lies on disk: checkpoints, bundles, and the weights of both."""
