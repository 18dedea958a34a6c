"""Files of rows, scored in bounded memory."""
