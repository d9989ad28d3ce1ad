"""The method: layers, masks, student and teacher, targets, loss. Knows no file format and no DeepSpeed."""
