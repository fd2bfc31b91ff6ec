"""The colours of all drawings: one colour for one idea."""

# After Okabe and Ito (2008): the colour-blind can tell them apart too.
ENCODER, ATTENTION, LSTM, WORD, GREY = "#0072B2", "#D55E00", "#009E73", "#A8528C", "#6B6B6B"
