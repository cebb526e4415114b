"""Commands beside Lightning's stages, one file each."""
