"""The files of a model zoo: what they are called, what they say, how they are fetched and trusted.

index.json           all models, their files and the SHA-256 of each
README.md            the same as a table
<name>/config.yaml   the full config
<name>/README.md     the model card, and its picture detections.jpg
<name>/model.json    the model's part of the index
<name>/<checkpoint>_<first 8 digits of its SHA-256>.safetensors
"""
