"""TensorRT: plans for the dense compute between two attentions, built, saved, loaded and run."""
