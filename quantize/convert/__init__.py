"""The pipeline that joins plan, walk, quantizer and writer; relayout; the second opinion of llm-compressor."""
