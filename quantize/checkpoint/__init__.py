"""Reading and writing safetensors checkpoints by byte range: headers, indexes, shards, side files, the manifest."""
