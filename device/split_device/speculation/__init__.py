"""Speculation: guesses at the next tokens of a text, which the model then checks several at a time."""
