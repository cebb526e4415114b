"""Records: fields, files, repetitions and differences."""
