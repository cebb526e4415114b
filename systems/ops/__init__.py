"""Operations below the layers: autograd functions, compilation, CUDA graphs, precision."""
