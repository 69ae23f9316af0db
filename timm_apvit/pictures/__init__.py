"""Pictures of where a model looks, and images as it takes them."""
