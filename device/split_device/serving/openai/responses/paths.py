"""Paths of the Responses API."""

RESPONSES_PATH = "/v1/responses"
RESPONSE_PATH = f"{RESPONSES_PATH}/{{id}}"
ITEMS_PATH = f"{RESPONSE_PATH}/input_items"
