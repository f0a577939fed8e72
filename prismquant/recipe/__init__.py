"""What the user asks for: recipes, their grammar and the presets."""
