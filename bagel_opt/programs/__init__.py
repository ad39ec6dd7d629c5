"""The contract between the sampling loop and the runtimes: names, signatures, and the small programs beside the model."""
