"""What a training step costs, in closed form, from a model's config alone. No weights load."""
