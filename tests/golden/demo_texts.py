"""Texts for the demo model's golden vectors, written for them: two of prose, two of chat."""

DEMO_TEXTS = {
    "manual": """\
Mounting a remote folder

To use files that are stored on another computer, you can mount a folder from that computer. The \
folder then appears as a directory in the local file system, and programs can open the files in \
it as if they were stored on the local disk.

Before you begin, make sure that the other computer is reachable over the network and that the \
user has permission to read the folder. If the connection is lost, programs that use the folder \
may wait until the server can be reached again. The option "soft" tells the system to return an \
error instead.

The following options are available:

    timeout    The number of seconds to wait before a request is sent again. The default is 60.
    retry      How many times a request is repeated. If this value is 0, requests are not \
repeated.
    readonly   Files can be read, but not written.

Note that the order of the options does not matter.
""",
    "novel": """\
The evening was cold, and there was a fire in the small room where Mrs. Harding sat with her \
sister. Neither of them had spoken for some time. At last the elder lady put down her work, and \
said, with a smile which she could not quite hide, that she believed Mr. Ellis would be there \
before the week was over.

"I do not know why you should think so," replied Anne. "He has a great deal of business in town, \
and his mother is not well. He told us himself that he must not be expected before the end of \
the month."

"He told us so, my dear, because he wished very much to be asked again. I saw him look at you \
when he said it. A man who does not mean to come has no need to look so unhappy about it."

Anne rose, and went to the window. The snow had begun to fall upon the road, and the light of a \
single lamp could be seen beyond the trees.
""",
    "dictionary_chat": """\
<｜User｜>What does the word lantern mean?<｜Assistant｜><think>
The user asks for the meaning of “lantern”. It is a noun. I will give a short definition.
</think>

“Lantern” is a noun. It means a light in a transparent case that protects it from the wind.\
<｜end▁of▁sentence｜><｜User｜>Is there another word for it?<｜Assistant｜><think>
The user asks for a synonym of “lantern”. I know a word with nearly the same meaning.
</think>

Another word for “lantern” is “lamp”.<｜end▁of▁sentence｜><｜User｜>Explain “stubborn” in a \
sentence.<｜Assistant｜><think>
The user asks for the meaning of “stubborn”. It is an adjective. I will give a short definition.
</think>

The adjective “stubborn” means not willing to change an opinion or to give up. For example: “The \
stubborn child would not go to bed.”<｜end▁of▁sentence｜>""",
    "computing_chat": """\
<｜User｜>What is a cache?<｜Assistant｜><think>
The user asks about cache, a term from computing.
</think>

A small fast memory that holds recently used data, so that later requests for the same data can \
be served without a read from the slower main memory. When the cache is full, an older entry \
must be removed before a new one can be stored.<｜end▁of▁sentence｜>\
<｜User｜>What is virtual memory?\
<｜Assistant｜><think>
The user asks about virtual memory, a term from computing.
</think>

A system that lets a program use more memory than the computer has. Pages that are not in use \
are written to the disk and are read again when the program needs \
them.<｜end▁of▁sentence｜><｜User｜>Give me an example sentence with the word \
compile.<｜Assistant｜><think>
The user wants a sentence that uses “compile”.
</think>

She compiled a list of all the books in the library.<｜end▁of▁sentence｜>""",
}
