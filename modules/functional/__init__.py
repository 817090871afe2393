"""Pure functions of tensors and strings: boxes, grammar, answers, advantages, packing, losses."""
