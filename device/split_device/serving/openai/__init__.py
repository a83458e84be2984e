"""OpenAI's dialect: requests and answers."""
