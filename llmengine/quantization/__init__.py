"""How weights are stored: formats of a matrix, which matrix of a model has which, and matrices with their tensors."""
