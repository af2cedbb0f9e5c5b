"""The model that users share: written as one folder, read back, or imported from nnU-Net."""
