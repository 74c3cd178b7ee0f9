"""`edgemed serve`: a node on the network of the PACS that answers the studies it is sent.

    settings      what it is told, from a TOML file
    journal       what was received, is to be done, was done (SQLite)
    store         its files, changed in an order that a power cut cannot break
    association   pynetdicom's server with limits on time, size and number
    work          complete study -> jobs -> workers -> results -> deliveries
    node          who may connect; a `work` that is fed from the network
    batch         a `work` that is fed from a folder or a query
    worker        a process for each GPU in which studies are answered
    study         the real answer: series, slices, result files
    deliver, pull results out (C-STORE, STOW-RS), studies in (C-MOVE, C-FIND, C-GET, QIDO-RS, WADO-RS)

Importing this costs nothing: pynetdicom, pydicom and dicomweb-client are imported where they are used.
"""
