"""OpenAI's formats: requests, answers and errors."""
