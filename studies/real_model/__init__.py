"""A pretrained model with real attention sinks: is the paper's gain the sink, and what should be used instead?"""
