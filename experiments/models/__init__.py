"""The small real models shipped for demonstrations and tests; the model card is README.md."""
