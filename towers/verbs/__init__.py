"""verbs: split, replicate, gather and what they share: who gets which rows."""
