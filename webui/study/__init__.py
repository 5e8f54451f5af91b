"""The page of one study: images, findings and the data that the viewer asks for."""
