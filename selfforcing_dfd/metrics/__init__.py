"""Numbers of any video that need no learned weights, frame by frame, in constant memory."""
