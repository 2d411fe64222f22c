"""What a GPU hour could be lost to, found before it is: on a login node without torch, and on the nodes of a job in seconds."""
