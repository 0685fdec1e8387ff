// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Base} from "./Base.sol";
import {FeeToken, Refuser, ReentrantToken, StubbornClient} from "./Parties.sol";
import {Ledger} from "../src/Ledger.sol";
import {SessionLane} from "../src/SessionLane.sol";
import {JobLane} from "../src/JobLane.sol";
import {NodeRegistry} from "../src/NodeRegistry.sol";
import {INodeRegistry} from "../src/interfaces/INodeRegistry.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";

contract SessionsTest is Base {
    function setUp() public {
        deployAll();
    }

    function open(address token_, uint128 deposit, bytes32 nonce) internal returns (bytes32) {
        SessionLane.SessionTerms memory t = sessionTerms(token_, deposit, nonce);
        bytes memory sig = sign(HOT_KEY, escrow.offerDigest(t));
        vm.prank(client);
        return escrow.openSession{value: token_ == address(0) ? deposit : 0}(t, sig);
    }

    function voucher(bytes32 id, uint128 amount) internal view returns (SessionLane.Voucher memory) {
        return SessionLane.Voucher(id, hot, amount, 10, 20, keccak256("transcript"));
    }

    function signed(SessionLane.Voucher memory v) internal view returns (bytes memory) {
        return sign(CLIENT_KEY, escrow.voucherDigest(v));
    }

    function settle(bytes32 id, uint128 amount) internal {
        SessionLane.Voucher memory v = voucher(id, amount);
        bytes memory sig = signed(v);
        vm.prank(ANYONE);
        escrow.settle(v, sig);
    }

    function expectOpen(SessionLane.SessionTerms memory t, bytes memory sig, address from, uint256 value, bytes memory error_) internal {
        vm.deal(from, 1000 ether);
        vm.prank(from);
        vm.expectRevert(error_);
        escrow.openSession{value: value}(t, sig);
    }

    function test_a_session_pays_the_host_and_returns_the_rest() public {
        bytes32 id = open(address(0), 10 ether, 0);
        SessionLane.Session memory s = escrow.sessions(id);
        yes(s.state == SessionLane.SessionState.Active && s.host == hot && s.client == client, "open");
        eq(s.settleBy, block.timestamp + 1 hours + 10 minutes, "settleBy");
        yes(id == keccak256(abi.encode(block.chainid, address(escrow), client, hot, bytes32(0))), "id");
        settle(id, 1 ether);
        settle(id, 3 ether);
        eq(escrow.credits(address(0), PAYOUT), 3 ether, "paid so far");
        SessionLane.Voucher memory v = voucher(id, 4 ether);
        bytes memory sig = signed(v);
        vm.prank(hot);
        escrow.settleAndClose(v, sig);
        eq(escrow.credits(address(0), PAYOUT), 4 ether, "host");
        eq(escrow.credits(address(0), client), 6 ether, "client");
        yes(escrow.sessions(id).state == SessionLane.SessionState.Settled, "settled");
        vm.prank(PAYOUT);
        escrow.withdraw(address(0), address(0xD00D));
        eq(address(0xD00D).balance, 4 ether, "withdrawn");
        vm.prank(PAYOUT);
        vm.expectRevert(abi.encodeWithSelector(Ledger.NothingToWithdraw.selector, address(0), PAYOUT));
        escrow.withdraw(address(0), address(0xD00D));
    }

    function test_a_token_session_with_top_up() public {
        bytes32 id = open(address(token), 100, 0);
        vm.prank(client);
        escrow.topUp(id, 50);
        settle(id, 150);
        vm.prank(hot);
        escrow.closeSession(id);
        eq(escrow.credits(address(token), PAYOUT), 150, "host");
        eq(escrow.credits(address(token), client), 0, "client");
        vm.prank(PAYOUT);
        escrow.withdraw(address(token), PAYOUT);
        eq(token.balanceOf(PAYOUT), 150, "withdrawn");
    }

    function test_open_is_refused() public {
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, 0);
        bytes memory sig = sign(HOT_KEY, escrow.offerDigest(t));
        expectOpen(t, sig, ANYONE, 1 ether, abi.encodeWithSelector(SessionLane.NotClient.selector, ANYONE, client));
        expectOpen(t, sig, client, 1, abi.encodeWithSelector(Ledger.WrongValue.selector, 1, 1 ether));
        expectOpen(t, sign(HOT2_KEY, escrow.offerDigest(t)), client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, hot));
        expectOpen(t, "", client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, hot));
        t.priceOutPerMTok -= 1;
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, hot));
        t = sessionTerms(address(0), 0, 0);
        expectOpen(t, sig, client, 0, abi.encodeWithSelector(SessionLane.ZeroDeposit.selector));
        t = sessionTerms(address(0), 1 ether, 0);
        t.offerValidUntil = uint64(block.timestamp) - 1;
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.OfferExpired.selector, block.timestamp, t.offerValidUntil));
        t = sessionTerms(address(0), 1 ether, 0);
        t.expiry = uint64(block.timestamp) + 31 days;
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.ExpiryOutOfBounds.selector, t.expiry, block.timestamp + 10, block.timestamp + 30 days));
        t = sessionTerms(address(0), 1 ether, 0);
        t.settleWindowSecs = 9;
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(Ledger.DurationOutOfBounds.selector, bytes32("settleWindowSecs"), 9, 10, 30 days));
        t = sessionTerms(address(0), 1 ether, 0);
        t.host = ANYONE;
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(NodeRegistry.UnknownNode.selector, ANYONE));
        t = sessionTerms(address(token), 1, 0);
        expectOpen(t, sign(HOT_KEY, escrow.offerDigest(t)), client, 1, abi.encodeWithSelector(Ledger.WrongValue.selector, 1, 0));
        open(address(0), 1 ether, 0);
        t = sessionTerms(address(0), 1 ether, 0);
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.SessionExists.selector, keccak256(abi.encode(block.chainid, address(escrow), client, hot, bytes32(0)))));
        vm.prank(PAYOUT);
        nodes.beginExit(hot);
        t = sessionTerms(address(0), 1 ether, bytes32(uint256(1)));
        expectOpen(t, sign(HOT_KEY, escrow.offerDigest(t)), client, 1 ether, abi.encodeWithSelector(NodeRegistry.NodeNotActive.selector, hot, INodeRegistry.NodeState.Exiting));
    }

    function test_a_rotated_hot_key_offers_and_closes_the_old_one_does_not() public {
        bytes32 id = open(address(0), 1 ether, 0);
        uint256 newKey = 0xBEEF;
        address newHot = vm.addr(newKey);
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, newHot);
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, bytes32(uint256(1)));
        expectOpen(t, sign(HOT_KEY, escrow.offerDigest(t)), client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, newHot));
        bytes memory sig = sign(newKey, escrow.offerDigest(t));
        vm.prank(client);
        escrow.openSession{value: 1 ether}(t, sig);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.NotClientNorHost.selector, hot));
        escrow.closeSession(id);
        vm.prank(newHot);
        escrow.closeSession(id);
        eq(escrow.credits(address(0), client), 1 ether, "zero-amount close returns everything");
    }

    function test_vouchers_that_do_not_count() public {
        bytes32 id = open(address(0), 10 ether, 0);
        settle(id, 2 ether);
        SessionLane.Voucher memory v = voucher(id, 2 ether);
        bytes memory sig = signed(v);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.VoucherNotImproving.selector, 2 ether, 2 ether));
        escrow.settle(v, sig);
        v = voucher(id, 10 ether + 1);
        sig = signed(v);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.VoucherAboveDeposit.selector, 10 ether + 1, 10 ether));
        escrow.settle(v, sig);
        v = voucher(id, 3 ether);
        sig = sign(HOT_KEY, escrow.voucherDigest(v));
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, sig);
        sig = signed(v);
        v.transcriptRoot = keccak256("another");
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, sig);
        v = voucher(id, 3 ether);
        v.host = hot2;
        vm.expectRevert(abi.encodeWithSelector(SessionLane.VoucherWrongHost.selector, hot2, hot));
        escrow.settle(v, sig);
        v = voucher(keccak256("nothing"), 3 ether);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SessionWrongState.selector, v.sessionId, SessionLane.SessionState.None));
        escrow.settle(v, sig);
        v = voucher(id, 1 ether);
        sig = signed(v);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.VoucherNotImproving.selector, 1 ether, 2 ether));
        escrow.settleAndClose(v, sig);
        v = voucher(id, 3 ether);
        sig = signed(v);
        vm.prank(hot2);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.NotHost.selector, hot2, hot));
        escrow.settleAndClose(v, sig);
    }

    function test_settle_and_close_with_a_voucher_that_someone_settled_first() public {
        bytes32 id = open(address(0), 10 ether, 0);
        settle(id, 2 ether);
        SessionLane.Voucher memory v = voucher(id, 2 ether);
        bytes memory sig = signed(v);
        vm.prank(hot);
        escrow.settleAndClose(v, sig);
        eq(escrow.credits(address(0), PAYOUT), 2 ether, "host");
        eq(escrow.credits(address(0), client), 8 ether, "client");
    }

    function test_a_digest_is_good_for_one_chain_and_one_escrow() public {
        bytes32 id = open(address(0), 10 ether, 0);
        SessionLane.Voucher memory v = voucher(id, 2 ether);
        bytes memory sig = signed(v);
        bytes32 here = escrow.voucherDigest(v);
        uint256 chain = block.chainid;
        vm.chainId(chain + 1);
        yes(escrow.voucherDigest(v) != here, "chain id is bound");
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, sig);
        vm.chainId(chain);
        bytes32 struct_ = keccak256(abi.encode(escrow.VOUCHER_TYPEHASH(), v.sessionId, v.host, v.cumulativeAmount, v.cumulativeIn, v.cumulativeOut, v.transcriptRoot));
        bytes32 domain = keccak256(abi.encode(keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"), keccak256("fabstir"), keccak256("1"), chain, address(escrow)));
        yes(domain == escrow.domainSeparator(), "domain");
        yes(here == keccak256(abi.encodePacked(hex"1901", domain, struct_)), "digest");
    }

    function test_settle_many_skips_what_does_not_count() public {
        bytes32 a = open(address(0), 5 ether, 0);
        bytes32 b = open(address(0), 5 ether, bytes32(uint256(1)));
        settle(a, 1 ether);
        SessionLane.Voucher[] memory v = new SessionLane.Voucher[](4);
        bytes[] memory sigs = new bytes[](4);
        v[0] = voucher(a, 1 ether);
        v[1] = voucher(b, 2 ether);
        v[2] = voucher(a, 6 ether);
        v[3] = voucher(a, 4 ether);
        for (uint256 i = 0; i < 4; ++i) sigs[i] = signed(v[i]);
        eq(escrow.settleMany(v, sigs), 2, "settled");
        eq(escrow.credits(address(0), PAYOUT), 6 ether, "host");
        v = new SessionLane.Voucher[](65);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BatchSize.selector, 65, 65, 64));
        escrow.settleMany(v, new bytes[](65));
        v = new SessionLane.Voucher[](2);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BatchSize.selector, 2, 1, 64));
        escrow.settleMany(v, new bytes[](1));
    }

    function test_closing_by_the_client_leaves_the_host_its_window() public {
        bytes32 id = open(address(0), 10 ether, 0);
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.NotClientNorHost.selector, ANYONE));
        escrow.closeSession(id);
        vm.prank(client);
        escrow.closeSession(id);
        uint256 settleBy = block.timestamp + 10 minutes;
        eq(escrow.sessions(id).settleBy, settleBy, "settleBy");
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SessionWrongState.selector, id, SessionLane.SessionState.Closing));
        escrow.closeSession(id);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SessionWrongState.selector, id, SessionLane.SessionState.Closing));
        escrow.topUp{value: 1}(id, 1);
        vm.warp(settleBy);
        settle(id, 3 ether);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SettleWindowOpen.selector, settleBy, settleBy));
        escrow.finalizeSession(id);
        vm.warp(settleBy + 1);
        SessionLane.Voucher memory v = voucher(id, 4 ether);
        bytes memory sig = signed(v);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SettleWindowOver.selector, settleBy + 1, settleBy));
        escrow.settle(v, sig);
        vm.prank(ANYONE);
        escrow.finalizeSession(id);
        eq(escrow.credits(address(0), client), 7 ether, "client");
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SessionWrongState.selector, id, SessionLane.SessionState.Settled));
        escrow.finalizeSession(id);
    }

    function test_closing_after_expiry_does_not_lengthen_the_session() public {
        bytes32 id = open(address(0), 10 ether, 0);
        uint64 settleBy = escrow.sessions(id).settleBy;
        vm.warp(settleBy - 5);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.SessionExpired.selector, settleBy - 5, settleBy - 10 minutes));
        escrow.topUp(id, 1);
        vm.prank(client);
        escrow.closeSession(id);
        eq(escrow.sessions(id).settleBy, settleBy, "settleBy");
    }

    function test_an_abandoned_session_is_finalized_by_anyone() public {
        bytes32 id = open(address(0), 10 ether, 0);
        vm.warp(escrow.sessions(id).settleBy + 1);
        vm.prank(client);
        vm.expectPartialRevert(SessionLane.SettleWindowOver.selector);
        escrow.closeSession(id);
        vm.prank(ANYONE);
        escrow.finalizeSession(id);
        eq(escrow.credits(address(0), client), 10 ether, "client");
    }

    function test_top_up_is_refused() public {
        bytes32 id = open(address(0), 1 ether, 0);
        vm.deal(ANYONE, 1 ether);
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.NotClient.selector, ANYONE, client));
        escrow.topUp{value: 1}(id, 1);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.ZeroDeposit.selector));
        escrow.topUp(id, 0);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(Ledger.WrongValue.selector, 1, 2));
        escrow.topUp{value: 1}(id, 2);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.DepositTooLarge.selector, uint256(type(uint128).max) + 1 ether));
        escrow.topUp(id, type(uint128).max);
    }

    function test_pause_stops_only_new_work() public {
        bytes32 id = open(address(0), 10 ether, 0);
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, ANYONE));
        escrow.pause();
        vm.prank(OWNER);
        escrow.pause();
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, bytes32(uint256(1)));
        expectOpen(t, sign(HOT_KEY, escrow.offerDigest(t)), client, 1 ether, abi.encodeWithSelector(Pausable.EnforcedPause.selector));
        JobLane.JobTerms memory jt = jobTerms(address(0), 1 ether);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(Pausable.EnforcedPause.selector));
        escrow.postJob{value: 1 ether}(jt, 0, "");
        vm.prank(client);
        escrow.topUp{value: 1 ether}(id, 1 ether);
        settle(id, 11 ether);
        vm.prank(hot);
        escrow.closeSession(id);
        vm.prank(PAYOUT);
        escrow.withdraw(address(0), PAYOUT);
        vm.prank(OWNER);
        escrow.unpause();
        open(address(0), 1 ether, bytes32(uint256(2)));
    }

    function test_a_token_with_a_transfer_fee_is_refused() public {
        FeeToken fee = new FeeToken();
        fee.transfer(client, 1000);
        vm.prank(client);
        fee.approve(address(escrow), 1000);
        SessionLane.SessionTerms memory t = sessionTerms(address(fee), 500, 0);
        expectOpen(t, sign(HOT_KEY, escrow.offerDigest(t)), client, 0, abi.encodeWithSelector(Ledger.ShortTransfer.selector, address(fee), 495, 500));
    }

    function test_a_token_cannot_enter_again_while_it_is_moved() public {
        ReentrantToken re = new ReentrantToken(escrow);
        re.transfer(client, 1000);
        vm.prank(client);
        re.approve(address(escrow), 1000);
        re.postOwnJob(jobTerms(address(re), 100));
        bytes32 id = open(address(re), 500, 0);
        eq(re.hooks(), 1, "the hook ran");
        eq(re.entered(), 0, "nothing was entered");
        // Its own job was cancelled in the hook, so that it is owed 100; the deposit of the other party is whole.
        eq(re.balanceOf(address(escrow)), 600, "held");
        eq(escrow.sessions(id).deposit, 500, "deposit");
    }

    function test_a_client_that_refuses_coin_harms_only_itself() public {
        StubbornClient stubborn = new StubbornClient(address(escrow));
        vm.deal(address(stubborn), 10 ether);
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 10 ether, 0);
        t.client = address(stubborn);
        bytes memory sig = sign(HOT_KEY, escrow.offerDigest(t));
        bytes32 id = abi.decode(stubborn.act(10 ether, abi.encodeCall(escrow.openSession, (t, sig))), (bytes32));
        SessionLane.Voucher memory v = voucher(id, 4 ether);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, address(stubborn)));
        escrow.settle(v, "");
        stubborn.approve(escrow.voucherDigest(v), true);
        vm.prank(hot);
        escrow.settleAndClose(v, "");
        eq(escrow.credits(address(0), PAYOUT), 4 ether, "host");
        bytes memory toItself = abi.encodeCall(escrow.withdraw, (address(0), address(stubborn)));
        bytes memory elsewhere = abi.encodeCall(escrow.withdraw, (address(0), address(0xD00D)));
        vm.expectPartialRevert(bytes4(keccak256("FailedCall()")));
        stubborn.act(0, toItself);
        eq(escrow.credits(address(0), address(stubborn)), 6 ether, "the credit is as before");
        stubborn.act(0, elsewhere);
        eq(address(0xD00D).balance, 6 ether, "elsewhere");
    }

    /// @dev Vouchers of a client whose account has code that refuses: settled in each of the three ways, and forged ones refused.
    function vouchersOfAnAccountWithCodeCount(bytes32 id) internal {
        yes(client.code.length != 0, "the client has code");
        (bool ok,) = client.call(abi.encodeCall(StubbornClient.isValidSignature, (0, "")));
        yes(!ok, "it refuses");
        SessionLane.Voucher memory v = voucher(id, 3 ether);
        bytes memory wrong = sign(HOT_KEY, escrow.voucherDigest(v));
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, wrong);
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, "");
        settle(id, 1 ether);
        SessionLane.Voucher[] memory many = new SessionLane.Voucher[](2);
        bytes[] memory sigs = new bytes[](2);
        (many[0], many[1]) = (v, voucher(id, 2 ether));
        (sigs[0], sigs[1]) = (wrong, signed(many[1]));
        eq(escrow.settleMany(many, sigs), 1, "settled");
        eq(escrow.credits(address(0), PAYOUT), 2 ether, "the forged one was left out");
        v = voucher(id, 4 ether);
        bytes memory sig = signed(v);
        vm.prank(hot);
        escrow.settleAndClose(v, sig);
        eq(escrow.credits(address(0), PAYOUT), 4 ether, "host");
        eq(escrow.credits(address(0), client), 6 ether, "client");
    }

    function test_a_voucher_stays_good_when_its_signer_gets_code() public {
        bytes32 id = open(address(0), 10 ether, 0);
        vm.etch(client, type(Refuser).runtimeCode);
        vouchersOfAnAccountWithCodeCount(id);
    }

    /// forge-config: default.evm_version = "prague"
    function test_a_voucher_stays_good_when_its_signer_delegates() public {
        bytes32 id = open(address(0), 10 ether, 0);
        vm.signAndAttachDelegation(address(new Refuser()), CLIENT_KEY);
        vouchersOfAnAccountWithCodeCount(id);
    }

    function test_code_may_approve_what_the_key_did_not_sign() public {
        bytes32 id = open(address(0), 10 ether, 0);
        StubbornClient wallet = new StubbornClient(address(escrow));
        vm.etch(client, address(wallet).code);
        SessionLane.Voucher memory v = voucher(id, 1 ether);
        bytes memory sig = sign(HOT_KEY, escrow.voucherDigest(v));
        vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
        escrow.settle(v, sig);
        StubbornClient(client).approve(escrow.voucherDigest(v), true);
        escrow.settle(v, sig);
        eq(escrow.credits(address(0), PAYOUT), 1 ether, "approved by code");
        settle(id, 2 ether);
        eq(escrow.credits(address(0), PAYOUT), 2 ether, "signed by key");
    }

    function test_a_signature_by_key_has_one_form() public {
        bytes32 id = open(address(0), 10 ether, 0);
        SessionLane.Voucher memory v = voucher(id, 1 ether);
        (uint8 parity, bytes32 r, bytes32 s) = vm.sign(CLIENT_KEY, escrow.voucherDigest(v));
        uint256 order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;
        bytes[] memory sigs = new bytes[](4);
        sigs[0] = abi.encodePacked(r, order - uint256(s), parity == 27 ? uint8(28) : uint8(27));
        sigs[1] = abi.encodePacked(r, s, parity - 27);
        sigs[2] = abi.encodePacked(r, s, parity, uint8(0));
        sigs[3] = abi.encodePacked(r, uint256(s) | uint256(parity - 27) << 255);
        for (uint256 withCode = 0; withCode < 2; ++withCode) {
            for (uint256 i = 0; i < sigs.length; ++i) {
                vm.expectRevert(abi.encodeWithSelector(SessionLane.BadVoucherSignature.selector, client));
                escrow.settle(v, sigs[i]);
            }
            vm.etch(client, type(Refuser).runtimeCode);
        }
        escrow.settle(v, abi.encodePacked(r, s, parity));
    }

    /// @dev The offer of a host whose hot key has code that refuses.
    function offersOfAnAccountWithCodeCount() internal {
        yes(hot.code.length != 0, "the hot key has code");
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, 0);
        bytes memory refusal = abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, hot);
        expectOpen(t, sign(HOT2_KEY, escrow.offerDigest(t)), client, 1 ether, refusal);
        expectOpen(t, "", client, 1 ether, refusal);
        bytes32 id = open(address(0), 1 ether, 0);
        yes(escrow.sessions(id).state == SessionLane.SessionState.Active, "open");
    }

    function test_an_offer_stays_good_when_its_hot_key_gets_code() public {
        vm.etch(hot, type(Refuser).runtimeCode);
        offersOfAnAccountWithCodeCount();
    }

    /// forge-config: default.evm_version = "prague"
    function test_an_offer_stays_good_when_its_hot_key_delegates() public {
        vm.signAndAttachDelegation(address(new Refuser()), HOT_KEY);
        offersOfAnAccountWithCodeCount();
    }

    function test_a_hot_key_that_is_a_contract_offers_by_its_code() public {
        StubbornClient wallet = new StubbornClient(address(escrow));
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, address(wallet));
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, 0);
        bytes memory sig = sign(HOT_KEY, escrow.offerDigest(t));
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, wallet));
        wallet.approve(escrow.offerDigest(t), true);
        open(address(0), 1 ether, 0);
        // The identity precompile answers with what it is given, the selector of ERC-1271 first; that is no yes.
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, address(4));
        t = sessionTerms(address(0), 1 ether, bytes32(uint256(1)));
        expectOpen(t, sig, client, 1 ether, abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, address(4)));
    }

    function test_a_node_without_a_hot_key_has_no_offers() public {
        address moved = vm.addr(0xBEEF);
        vm.prank(PAYOUT);
        nodes.setHotKey(hot, moved);
        registerNode(moved, PAYOUT);
        yes(nodes.activeHotKey(hot) == address(0), "its key serves another node");
        SessionLane.SessionTerms memory t = sessionTerms(address(0), 1 ether, 0);
        bytes memory refusal = abi.encodeWithSelector(SessionLane.BadOfferSignature.selector, address(0));
        expectOpen(t, "", client, 1 ether, refusal);
        expectOpen(t, new bytes(65), client, 1 ether, refusal);
        expectOpen(t, sign(0xBEEF, escrow.offerDigest(t)), client, 1 ether, refusal);
    }

    function test_a_plain_transfer_to_the_escrow_is_refused() public {
        vm.deal(ANYONE, 1 ether);
        vm.prank(ANYONE);
        (bool ok,) = address(escrow).call{value: 1}("");
        yes(!ok, "refused");
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(Ledger.ZeroAddress.selector));
        escrow.withdraw(address(0), address(0));
    }
}
