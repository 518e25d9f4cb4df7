/* SPDX-License-Identifier: MIT */
/*
 * The notifier protocol (notify.h, range.c), checked by spin.
 *
 * CHANGERS changers and READERS readers over two pages. The stores that
 * publish (a slot's range and use, a section's range and ticket, a hold) go
 * through a store buffer of their process (x86 TSO: first in, first out,
 * drained by fences and locked operations), so they may become visible after
 * later loads of the same process: the very reordering that fences (a), (b)
 * and (c) are there for. What is stored under a lock is visible at once: a
 * lock's own operations order it.
 *
 * Changer 0 changes page 1, changer 1 page 0 or both, CHANGES times each (one
 * changer alone: any of the three). A reader opens SECTIONS sections of one
 * page; each ends by an attempt to install what it looked up (valid, under the
 * listener's lock) or to write through it (hold). With -DROLES reader 0 only
 * installs and reader 1 only writes. A look at a slot (use and range, ticket
 * and range) is one step, as the seqlock of a slot makes it (R1); with -DTORN
 * it is three.
 *
 * Checked in every state:
 *   N1, N2  what is installed for a page is what the primary table says, and
 *           nothing is installed while a change of the page may commit
 *   N7      the same of what is installed without a section (-DQUIET: the readers do
 *           nothing else), whatever fences and hits there are
 *   N4      nobody holds a page of a change whose start has returned, and who
 *           holds a page looked up what the primary table says
 *   and no deadlock.
 *
 * Mutations, each of which must make the check fail (README.md):
 *   -DNO_FENCE_A -DNO_FENCE_B -DNO_FENCE_C  without that fence
 *   -DNO_HIT       a change does not mark readers
 *   -DPLAIN_HIT    it does, but by a store of its ticket, not by the CAS (R3)
 *   -DNO_HOLD_WAIT a start does not wait for holds
 *   -DVALID_EARLY  valid is asked before the lock is taken
 *   -DQUIET_EARLY  with -DQUIET: changes are looked for before the lock is taken
 */
#ifndef CHANGERS
#define CHANGERS 2
#endif
#ifndef READERS
#define READERS 2
#endif
#ifndef CHANGES
#define CHANGES 1
#endif
#ifndef SECTIONS
#define SECTIONS 1
#endif

/* The words of memory. c: changer, r: reader, p: page. */
#define USE(c)	   (0 + (c)) /* odd: in flight */
#define RANGE(c)   (2 + (c)) /* set of pages */
#define TICKET(r)  (4 + (r)) /* odd: in a section */
#define WANTS(r)   (6 + (r)) /* set of pages */
#define HOLD(r)	   (8 + (r))
#define HIT(r)	   (10 + (r))
#define VERSION(p) (12 + (p)) /* the primary table */
#define ENTRY(p)   (14 + (p)) /* the listener's table: 0, or version + 1 */
#define LOCK	   16	      /* the listener's lock */
#define WORDS	   17

byte mem[WORDS];
chan buffer[4] = [4] of { byte, byte };

/* Ghosts: page sets. */
byte returned[2]; /* changer: its start has returned, its end has not been called */
byte holds[2];	  /* reader */

#define STORE(word, value) buffer[me]!word, value
#define DRAINED empty(buffer[me])
#define IN(set, p) (((set) >> (p)) & 1)

#ifdef NO_FENCE_A
#define FENCE_A skip
#else
#define FENCE_A DRAINED
#endif
#ifdef NO_FENCE_B
#define FENCE_B skip
#else
#define FENCE_B DRAINED
#endif
#ifdef NO_FENCE_C
#define FENCE_C skip
#else
#define FENCE_C DRAINED
#endif

active proctype memory()
{
	byte word, value;
end:
	do
	:: atomic { buffer[0]?word, value -> mem[word] = value; word = 0; value = 0 }
	:: atomic { buffer[1]?word, value -> mem[word] = value; word = 0; value = 0 }
	:: atomic { buffer[2]?word, value -> mem[word] = value; word = 0; value = 0 }
	:: atomic { buffer[3]?word, value -> mem[word] = value; word = 0; value = 0 }
	od
}

/*
 * A consistent look at a slot: `seq` is odd and `set` its range, or set is 0.
 * TORN: three loads, and again if the first and the third differ.
 */
#ifdef TORN
#define LOOK(SEQ, SET, who)                              \
	do                                               \
	:: atomic {                                      \
		seq = mem[SEQ(who)];                     \
		set = 0;                                 \
		if                                       \
		:: (seq & 1) == 0 -> break               \
		:: else                                  \
		fi }                                     \
	   set = mem[SET(who)];                          \
	   if                                            \
	   :: mem[SEQ(who)] == seq -> break              \
	   :: else                                       \
	   fi                                            \
	od
#define ATOMIC
#else
#define LOOK(SEQ, SET, who)                              \
	seq = mem[SEQ(who)];                             \
	set = ((seq & 1) -> mem[SET(who)] : 0)
#define ATOMIC atomic
#endif

/* --- a change --- */

inline stop_reader(r)
{
	ATOMIC {
		LOOK(TICKET, WANTS, r);
		set = set & range;
		seq = (set -> seq : 0)
	}
	if
	:: set != 0 ->
#ifndef NO_HIT
#ifdef PLAIN_HIT
		atomic { DRAINED -> mem[HIT(r)] = seq }
#else
		atomic { DRAINED -> mem[HIT(r)] = (mem[HIT(r)] < seq -> seq : mem[HIT(r)]) }
#endif
#endif
#ifndef NO_HOLD_WAIT
		atomic { mem[HOLD(r)] == 0 || mem[TICKET(r)] != seq -> seq = 0; set = 0 }
#else
		atomic { seq = 0; set = 0 }
#endif
	:: else
	fi
}

proctype changer(byte me)
{
	byte range, use, seq, set, n;

	do
	:: atomic {
		n < CHANGES && DRAINED -> /* the claim is a locked operation */
		if
		:: me == 1 || CHANGERS == 1 -> range = 1
		:: me == 1 || CHANGERS == 1 -> range = 3
		:: me == 0 -> range = 2
		fi;
		STORE(RANGE(me), range);
		use++;
		STORE(USE(me), use)
	   }
	   FENCE_A;
	   stop_reader(0);
#if READERS > 1
	   stop_reader(1);
#endif
	   /* the listener's start */
	   atomic {
		DRAINED && mem[LOCK] == 0 ->
		if :: range & 1 -> mem[ENTRY(0)] = 0 :: else fi;
		if :: range & 2 -> mem[ENTRY(1)] = 0 :: else fi;
		returned[me] = range
	   }
	   /* commit, under the planner's lock */
	   atomic {
		if :: range & 1 -> mem[VERSION(0)]++ :: else fi;
		if :: range & 2 -> mem[VERSION(1)]++ :: else fi
	   }
	   atomic {
		returned[me] = 0;
		use++;
		STORE(USE(me), use);
		range = 0;
		n++
	   }
	:: n == CHANGES -> break
	od
}

/* --- a reader --- */

/* `found` is 1 + the changer that has a change of the page in flight, or 0; `seq` is that change's use. */
inline find()
{
	ATOMIC {
		LOOK(USE, RANGE, 0);
		found = (IN(set, page) -> 1 : 0);
		set = 0
	}
#if CHANGERS > 1
	ATOMIC {
		if
		:: found == 0 ->
			LOOK(USE, RANGE, 1);
			found = (IN(set, page) -> 2 : 0);
			set = 0
		:: else
		fi
	}
#endif
}

/* R4: changes first, hit second. */
inline clean()
{
	find();
	atomic { good = (found == 0 && mem[HIT(self)] != ticket); found = 0; seq = 0 }
}

inline take_lock()
{
	atomic { DRAINED && mem[LOCK] == 0 -> mem[LOCK] = 1 }
}

inline install()
{
#ifdef VALID_EARLY
	clean();
	take_lock();
#else
	take_lock();
	clean();
#endif
	atomic {
		mem[ENTRY(page)] = (good -> version + 1 : mem[ENTRY(page)]);
		good = 0;
		mem[LOCK] = 0
	}
}

/* N7. Looked up after the look at changes, and in a step of its own. */
inline install_quietly()
{
#ifdef QUIET_EARLY
	find();
	take_lock();
#else
	take_lock();
	find();
#endif
	atomic { good = (found == 0); found = 0; seq = 0 }
	version = mem[VERSION(page)];
	atomic {
		mem[ENTRY(page)] = (good -> version + 1 : mem[ENTRY(page)]);
		good = 0;
		version = 0;
		mem[LOCK] = 0
	}
}

/* The write itself is the time between the two ghosts; it is visible before the ticket that follows it. */
inline hold_and_write()
{
	STORE(HOLD(self), 1);
	FENCE_C;
	clean();
	atomic {
		holds[self] = (good -> 1 << page : 0);
		assert(!good || version == mem[VERSION(page)]);
		good = 0
	}
	holds[self] = 0
}

proctype reader(byte me; byte self)
{
	byte page, ticket, version, seq, set, found, n;
	bit good, held;

	do
	:: atomic {
		n < SECTIONS ->
		n++;
		if
		:: page = 0
		:: page = 1
		fi
	   }
#ifdef QUIET
	   install_quietly();
#else
	   do
	   :: atomic { STORE(WANTS(self), 1 << page); ticket++; STORE(TICKET(self), ticket) }
	      FENCE_B;
	      find();
	      if
	      :: found == 0 -> break
	      :: else
	      fi;
	      atomic { ticket++; STORE(TICKET(self), ticket) }
	      atomic { mem[USE(found - 1)] != seq -> found = 0; seq = 0 }
	   od;
	   atomic { seq = 0; version = mem[VERSION(page)] }
	   if
#ifdef ROLES
	   :: self == 0 -> install()
	   :: self == 1 -> hold_and_write(); held = 1
#else
	   :: install()
	   :: hold_and_write(); held = 1
#endif
	   fi;
	   atomic { version = 0; ticket++; STORE(TICKET(self), ticket) }
	   if
	   :: held -> atomic { DRAINED -> mem[HOLD(self)] = 0; held = 0 }
	   :: else
	   fi
#endif
	:: n == SECTIONS -> break
	od
}

/* --- what must hold --- */

#define CURRENT(p) (mem[ENTRY(p)] == 0 || mem[ENTRY(p)] == mem[VERSION(p)] + 1)
#define DROPPED(p) (mem[ENTRY(p)] == 0 || !IN(returned[0] | returned[1], p))
#define FREE(p)	   (!IN(holds[0] | holds[1], p) || !IN(returned[0] | returned[1], p))

active proctype monitor()
{
end:
	atomic {
		!(CURRENT(0) && CURRENT(1) && DROPPED(0) && DROPPED(1) && FREE(0) && FREE(1)) ->
		assert(CURRENT(0) && CURRENT(1));
		assert(DROPPED(0) && DROPPED(1));
		assert(FREE(0) && FREE(1))
	}
}

init
{
	atomic {
		run changer(0);
#if CHANGERS > 1
		run changer(1);
#endif
		run reader(2, 0);
#if READERS > 1
		run reader(3, 1)
#endif
	}
}
