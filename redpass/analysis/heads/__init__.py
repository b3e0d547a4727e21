"""Heads of attention: how alike they are, what each gives, and attentions with other heads."""
