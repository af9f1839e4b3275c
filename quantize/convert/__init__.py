"""The pipeline that joins plan, walk, quantizer and writer, relayout, and the second opinion of llm-compressor."""
