"""planning: what looks at a placement from outside, or works one out."""
