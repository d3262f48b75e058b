"""Data sets made into webdataset shards: the emoji of the demo, and any folder of images with captions."""
