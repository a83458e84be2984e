"""Batches: files of prompts or requests, which become jobs in stores of their own, and the files of answers."""
