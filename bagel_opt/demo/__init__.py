"""The model that ships, and all that makes it.

world, texts    what there is to see, and to say about it
checker         reads a picture of the world
data            training batches; objective: their losses; loop: weights, graphs, states; samples: sheets on the way
layout, train   the model's sizes and files; `python -m bagel_opt.demo.train` makes it
evaluate        `python -m bagel_opt.demo.evaluate`: how often it does what it is told
sheet, __main__ `python -m bagel_opt.demo`: a contact sheet of it at work
"""
