-- read.lua: one command that reads. Writes nothing.
--
-- KEYS     1 meta   then those of the command, which come first in it
-- ARGV     1 replica   2 the command's name   then what follows its keys
-- returns  { head, reply of the command }; head as in read_head.lua

local words = { ARGV[2] }
for i = 2, #KEYS do words[#words + 1] = KEYS[i] end
for i = 3, #ARGV do words[#words + 1] = ARGV[i] end
return { head, redis.call(unpack(words)) }
