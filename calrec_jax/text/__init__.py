"""From items to tokens, and from tokens to rows."""
