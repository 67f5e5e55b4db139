"""Files that are there whole or not at all: parts with checksums, plans, composed models, and merging as a stream.

Merging files needs neither timm nor the memory that a model takes.
"""
