"""Measuring folders of translated images and comparing methods."""
