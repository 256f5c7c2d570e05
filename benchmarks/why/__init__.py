"""Small experiments that show why scale control changes an optimizer's steps."""
