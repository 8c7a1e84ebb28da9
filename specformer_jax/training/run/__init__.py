"""What a training run keeps in its folder, and who may write there."""
