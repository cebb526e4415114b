"""Networks: pure `nn.Module`s, one file per architecture; none imports Lightning."""
