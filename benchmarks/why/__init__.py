"""Three small experiments that show why scale control changes what an optimizer does."""
