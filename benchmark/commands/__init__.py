"""Commands other than Lightning's stages, one file each."""
