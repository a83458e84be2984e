"""OpenAI's Responses API: requests, answers, events, and responses that are kept."""
