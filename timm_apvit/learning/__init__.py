"""What any training loop can use to teach an APViT faster."""
