"""What a language-model call costs, and guards that cap it."""
