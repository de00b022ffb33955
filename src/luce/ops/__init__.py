"""Operations on rows of logits. They return one value per row and know nothing of reductions or masks."""
